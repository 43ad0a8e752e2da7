package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/flipside-linux/flipside/updater/config"
	"github.com/flipside-linux/flipside/updater/control"
)

func (a *app) channelCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "channel",
		Short: "which channel this host asks for",
		Args:  cobra.NoArgs,
		Long: `Channel shows and changes the channel that the update server is asked for. What "channel set" says is kept on the state partition, wins
over update.channel in the configuration and is shown by "flipside config show --origin".

Exit status: as of "flipside check" for set, as of "flipside plan" for plan.`,
	}
	var reset bool
	set := &cobra.Command{
		Use:   "set NAME",
		Short: "ask for another channel from now on, and ask at once",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if (len(args) == 1) == reset {
				return withHint(usagef("channel set takes the name of a channel, or --reset"), "usage: %s", cmd.UseLine())
			}
			c := control.Command{Action: control.SetChannel}
			if !reset {
				if c.Value = args[0]; c.Value == "" {
					return usagef("the name of the channel is empty")
				}
			}
			st, err := a.answered(cmd.Context(), c)
			if err != nil {
				return err
			}
			if !a.json {
				fmt.Fprintf(a.stdout, "asking for channel %s\n", st.Channel)
			}
			return a.outcome(st)
		},
	}
	set.Flags().BoolVar(&reset, "reset", false, "go back to what the configuration says")
	cmd.AddCommand(set, a.channelList(), &cobra.Command{
		Use:   "plan NAME",
		Short: "what the offers of another channel would do; nothing changes",
		Args:  exactly(1, "the name of a channel"),
		RunE:  func(cmd *cobra.Command, args []string) error { return a.plan(cmd, args[0]) },
	})
	return cmd
}

func (a *app) channelList() *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "the channel in use, and the one that the configuration names",
		Args:  cobra.NoArgs,
		Long:  `List shows what this host knows of channels. The update protocol cannot ask a server which channels it has; "flipside channel plan NAME" tries one.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			st, err := a.now(cmd.Context())
			if err != nil {
				return err
			}
			type channel struct {
				Name   string `json:"name"`
				InUse  bool   `json:"in_use"`
				Origin string `json:"origin"`
			}
			list := []channel{{st.Channel, true, "in use"}}
			if l, err := config.Read(config.Source{File: a.config}); err == nil {
				from := "the default"
				if o, ok := l.Origins["update.channel"]; ok {
					from = o.String()
				}
				if l.Update.Channel == st.Channel {
					list[0].Origin = from
				} else {
					list = append(list, channel{l.Update.Channel, false, from})
				}
			}
			if a.json {
				return a.printJSON(struct {
					Schema   string    `json:"schema"`
					Channels []channel `json:"channels"`
				}{"flipside.host-channels/v1", list})
			}
			s := a.pen()
			for _, c := range list {
				mark := "  "
				if c.InUse {
					mark = s.paint(green, "* ")
				}
				fmt.Fprintf(a.stdout, "%s%s  %s\n", mark, pad(c.Name, 16), s.paint(faint, c.Origin))
			}
			return nil
		},
	}
}
