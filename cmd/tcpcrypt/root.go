package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

// newRoot builds the whole command tree. start is what `run` brings a host up with.
func newRoot(start startFunc) *cobra.Command {
	root := &cobra.Command{
		Use:   "tcpcrypt",
		Short: "Encrypt the TCP connections of unmodified applications",
		Long: `tcpcrypt makes TCP connections encrypt themselves (RFC 8547, RFC 8548) below
unmodified applications. A connection whose other end does not speak TCP-ENO
stays the plain TCP connection that it would have been.`,
		SilenceUsage:      true,
		SilenceErrors:     true,
		DisableAutoGenTag: true,
		// The suggestions are a text of several lines.
		DisableSuggestions: true,
	}
	root.CompletionOptions.HiddenDefaultCmd = true
	root.SetHelpCommand(newHelpCommand())
	root.AddCommand(
		newRunCommand(start),
		newStatusCommand(),
		newFlowsCommand(),
		newStatsCommand(),
		newSessionCommand(),
		newRekeyCommand(),
		newCacheCommand(),
		newDoctorCommand(),
		newCaptureCommand(),
		newBenchCommand(),
		newVersionCommand(),
	)
	return root
}

// newHelpCommand is cobra's own, but for what it says about no command.
func newHelpCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "help [COMMAND]",
		Short: "Show the help of a command",
		RunE: func(cmd *cobra.Command, args []string) error {
			of, _, err := cmd.Root().Find(args)
			if err != nil {
				return err
			}
			of.InitDefaultHelpFlag()
			return of.Help()
		},
	}
}

// exactArgs is cobra.ExactArgs with an error that names what is missing.
func exactArgs(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) < len(names) {
			return fmt.Errorf("%s: %s is missing", cmd.CommandPath(), names[len(args)])
		}
		if len(args) > len(names) {
			return fmt.Errorf("%s: unexpected argument %q", cmd.CommandPath(), args[len(names)])
		}
		return nil
	}
}
