package omaha

import (
	"encoding/xml"
	"fmt"

	wire "github.com/flatcar/go-omaha/omaha"
)

// request is what one exchange is to carry.
type request struct {
	onDemand, ping, check bool
	deltas                bool
	events                []Event
	hold, prefix          string
}

// requestDoc is go-omaha's request with the attributes that update_engine always sends and go-omaha leaves out when
// they are empty or false; a server that distinguishes absent from empty sees what it knows.
type requestDoc struct {
	wire.Request
	Apps []appDoc `xml:"app"`
}

type appDoc struct {
	*wire.AppRequest
	Board         string `xml:"board,attr"`
	MachineAlias  string `xml:"machinealias,attr"`
	HardwareClass string `xml:"hardware_class,attr"`
	DeltaOK       bool   `xml:"delta_okay,attr"`
	Hold          string `xml:"hold,attr,omitempty"`
}

// request builds the bytes on the wire.
func (c *Client) request(r request) ([]byte, error) {
	if err := c.validate(); err != nil {
		return nil, err
	}
	source := "scheduler"
	if r.onDemand {
		source = "ondemandupdate"
	}
	app := &wire.AppRequest{
		ID: c.AppID, Version: c.Version, Track: c.Track, Board: c.Board, Lang: "en-US",
		BootID: braced(c.BootID), MachineID: c.MachineID,
		OEM: c.OEM, OEMVersion: c.OEMVersion, AlephVersion: c.AlephVersion,
	}
	if r.ping {
		app.AddPing()
	}
	if r.check {
		app.AddUpdateCheck().TargetVersionPrefix = r.prefix
	}
	for _, e := range r.events {
		if err := e.check(); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrConfig, err)
		}
		app.Events = append(app.Events, e.wire())
	}
	doc := requestDoc{
		Request: wire.Request{
			Protocol: "3.0", InstallSource: source, IsMachine: 1, Version: c.agent(), UpdaterVersion: c.agent(),
			OS: &wire.OS{
				Platform: or(c.OSPlatform, "CoreOS"), Version: or(c.OSVersion, "Chateau"), Arch: c.OSArch,
				ServicePack: c.Version + "_" + or(c.Machine, "x86_64"),
			},
		},
		Apps: []appDoc{{AppRequest: app, Board: c.Board, MachineAlias: Printable(c.MachineAlias), DeltaOK: r.deltas, Hold: Printable(r.hold)}},
	}
	body, err := xml.Marshal(doc)
	if err != nil {
		return nil, fmt.Errorf("%w: write the request: %w", ErrConfig, err)
	}
	return append([]byte(xml.Header), body...), nil
}

func or(s, fallback string) string {
	if s == "" {
		return fallback
	}
	return s
}
