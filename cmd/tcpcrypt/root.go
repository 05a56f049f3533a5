package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
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
	root.SetFlagErrorFunc(flagError)
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

// flagError says what is wrong with a flag in words that are not the parser's.
func flagError(cmd *cobra.Command, err error) error {
	if unknown := (*pflag.NotExistError)(nil); errors.As(err, &unknown) {
		return fmt.Errorf("%w: %s --help lists them", err, cmd.CommandPath())
	}
	if bad := (*pflag.InvalidValueError)(nil); errors.As(err, &bad) {
		return fmt.Errorf("invalid argument %q for \"--%s\" flag: %w", bad.GetValue(), bad.GetFlag().Name, valueError(bad.Unwrap()))
	}
	return err
}

// valueError is err, but for the parsers of numbers and durations, whose errors
// are about themselves.
func valueError(err error) error {
	bad := (*strconv.NumError)(nil)
	switch {
	case !errors.As(err, &bad):
		return err
	case errors.Is(err, strconv.ErrRange):
		return fmt.Errorf("%q is out of range", bad.Num)
	case bad.Func == "ParseBool":
		return fmt.Errorf("%q is neither true nor false", bad.Num)
	case bad.Func == "ParseFloat":
		return fmt.Errorf("%q is not a number", bad.Num)
	}
	return fmt.Errorf("%q is not a whole number", bad.Num)
}

// exactArgs is cobra.ExactArgs with an error that names what is missing.
func exactArgs(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) < len(names) {
			return fmt.Errorf("%s: %s is missing", commandName(cmd), names[len(args)])
		}
		if len(args) > len(names) {
			return unexpected(cmd, args[len(names)])
		}
		return nil
	}
}

func unexpected(cmd *cobra.Command, arg string) error {
	hint := ""
	if cmd.Flags().Lookup("interface") != nil {
		hint = ": an interface is named with --interface"
	}
	return fmt.Errorf("%s: unexpected argument %q%s", commandName(cmd), arg, hint)
}

// commandName is the path of cmd without the program's name, which begins every
// error.
func commandName(cmd *cobra.Command) string {
	return strings.TrimPrefix(cmd.CommandPath(), cmd.Root().Name()+" ")
}
