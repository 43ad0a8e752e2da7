package omaha

import (
	"fmt"

	wire "github.com/flatcar/go-omaha/omaha"
)

// Event types and results that this agent sends. Nebraska records exactly six pairs and acknowledges and forgets all others.
const (
	TypeUpdateComplete   = 3
	TypeDownloadStarted  = 13
	TypeDownloadFinished = 14
	TypeInstalled        = 800 // Nebraska's own: installed, waiting for a reboot

	ResultError         = 0
	ResultSuccess       = 1
	ResultSuccessReboot = 2
)

// Error codes of an event 3/0, with the numbers of update_engine: servers translate them for people.
const (
	CodeError           = 1
	CodeTransfer        = 9
	CodePayloadHash     = 10
	CodePayloadSize     = 11
	CodeEmptyResponse   = 30
	CodeXMLParse        = 31
	CodeResponseInvalid = 34
	CodeHTTP            = 37
	CodeRollback        = 44   // booted back to the old version
	codeHTTPStatus      = 2000 // plus the HTTP status of the update server
)

// Event is one thing that happened to an update. The sequence that keeps a server's picture right is
// [DownloadStarted], [DownloadFinished], [Installed], the reboot, then [Booted] once; or [Failed] from any point.
type Event struct {
	Type            int    `json:"type"`
	Result          int    `json:"result"`
	ErrorCode       int    `json:"error_code,omitempty"`
	PreviousVersion string `json:"previous_version,omitempty"`
}

// DownloadStarted is sent before the first byte of a payload is asked for.
func DownloadStarted() Event { return Event{Type: TypeDownloadStarted, Result: ResultSuccess} }

// DownloadFinished is sent when the payload is complete and its signature holds.
func DownloadFinished() Event { return Event{Type: TypeDownloadFinished, Result: ResultSuccess} }

// Installed is sent when the other slot is active and only the reboot is missing.
func Installed() Event { return Event{Type: TypeInstalled, Result: ResultSuccess} }

// Booted is sent once, after the host has really booted the new version and is healthy.
func Booted(previous string) Event {
	return Event{Type: TypeUpdateComplete, Result: ResultSuccessReboot, PreviousVersion: previous}
}

// Failed is sent when an update has come to nothing, at whatever point: a failed download is not its own event.
func Failed(code int) Event {
	return Event{Type: TypeUpdateComplete, Result: ResultError, ErrorCode: code}
}

// check refuses the one event that does harm: without a previous version, a 3/2 marks the running grant as complete
// and writes a version into the server's history that the host does not run.
func (e Event) check() error {
	if e.Type == TypeUpdateComplete && e.Result == ResultSuccessReboot && e.PreviousVersion == "" {
		return fmt.Errorf("event 3/2 without the previous version")
	}
	if !plain(e.PreviousVersion) || len(e.PreviousVersion) > maxVersion {
		return fmt.Errorf("event %d/%d with previous version %q", e.Type, e.Result, Printable(e.PreviousVersion))
	}
	return nil
}

func (e Event) wire() *wire.EventRequest {
	return &wire.EventRequest{
		Type: wire.EventType(e.Type), Result: wire.EventResult(e.Result),
		ErrorCode: e.ErrorCode, PreviousVersion: e.PreviousVersion,
	}
}
