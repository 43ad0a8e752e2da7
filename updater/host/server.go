package host

import (
	"context"
	"errors"

	"github.com/flipside-linux/flipside/omaha"
	"github.com/flipside-linux/flipside/updater"
)

// server is the update server as the engine asks it.
type server struct {
	client    omaha.Client
	target    *target // the channel that is asked for, and the prefix of the versions that are accepted
	downgrade bool
	why       func() string         // what the host waits for, for the server's list of hosts
	checked   func(context.Context) // what is to be done once the server has answered
}

func (s *server) Check(ctx context.Context, ask updater.AskServer) updater.Answered {
	client, pin := s.client, ""
	client.Track, pin = s.target.get()
	a, err := client.Check(ctx, omaha.CheckRequest{
		OnDemand: ask.OnDemand, Reset: ask.Unwedge, Deltas: !ask.Whole, AllowDowngrade: s.downgrade, VersionPrefix: pin, Hold: s.why(),
	})
	if err != nil {
		ev := updater.Answered{Err: err}
		var oe *omaha.Error
		if errors.As(err, &oe) {
			ev.Retry = oe.RetryAfter
		}
		return ev
	}
	s.checked(ctx)
	return updater.Answered{Offer: a.Offer, Reason: a.Reason.Text, Wedged: a.Reason.Kind == omaha.InProgress, Retry: a.PollInterval}
}

func (s *server) Report(ctx context.Context, ev omaha.Event) error {
	client := s.client
	client.Track, _ = s.target.get()
	return client.Report(ctx, ev)
}

// noServer is there when update.server is "disabled".
type noServer struct{}

func (noServer) Check(context.Context, updater.AskServer) updater.Answered {
	return updater.Answered{Reason: "no server is asked (update.server is \"disabled\")"}
}

func (noServer) Report(context.Context, omaha.Event) error { return nil }
