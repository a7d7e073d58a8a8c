// Package cli is the command line of devcluster.
package cli

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"geminibatch.dev/devcluster/internal/node"
)

// Programs are the programs built into the binary.
type Programs struct {
	Names []string
	// Run becomes the program and does not return.
	Run func(name string, args []string)
}

// Exit codes.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

const usage = `devcluster is a Kubernetes cluster in one binary, for tests.

Usage:
  devcluster up [flags]                      run a cluster until told to stop
  devcluster down [--dir DIR]                end it; remove what a killed one left
  devcluster ctl --dir DIR COMMAND [NAME]    stop, start or pause its components
  devcluster image load --dir DIR FILE...    give image archives to its node
  devcluster exec PROGRAM [args...]          run one of the programs inside
  devcluster version                         print the versions inside

'devcluster up' prints one line on stdout, the path of a kubeconfig, when the
cluster is ready, and everything else on stderr. 'devcluster COMMAND --help'
tells more.

Called by the name of a program inside (through a symbolic link), devcluster is
that program: %s.

Environment:
  KUBEBUILDER_ASSETS   a directory; a program found there is used instead of
                       the one inside
  TMPDIR               where temporary cluster directories are made
`

// Main runs the command line and returns the exit code.
func Main(argv []string, programs Programs) int {
	if name := filepath.Base(argv[0]); slices.Contains(programs.Names, name) {
		programs.Run(name, argv[1:])
	}
	if len(argv) < 2 {
		fmt.Fprintf(os.Stderr, usage, strings.Join(programs.Names, ", "))
		return exitUsage
	}
	args := argv[2:]
	switch argv[1] {
	case "up":
		return up(args)
	case "down":
		return down(args)
	case "ctl":
		return ctl(args)
	case "image":
		return imageCommand(args)
	case "exec":
		return execProgram(args, programs)
	case "version", "--version":
		return version()
	case "node-init": // these two are called by 'up --node' only
		return failed(node.Init(args))
	case "node-run":
		return nodeRun(args)
	case "help", "--help", "-h":
		fmt.Printf(usage, strings.Join(programs.Names, ", "))
		return exitOK
	default:
		return usageError("unknown command %q; see 'devcluster --help'", argv[1])
	}
}

// newFlags makes a flag set whose help starts with the text.
func newFlags(name, text string) *flag.FlagSet {
	flags := flag.NewFlagSet(name, flag.ContinueOnError)
	flags.SetOutput(io.Discard) // errors and help are printed by parse
	flags.Usage = func() {
		fmt.Fprintln(flags.Output(), text)
		flags.PrintDefaults()
	}
	return flags
}

// parse reports whether to go on; if not, the exit code says why.
func parse(flags *flag.FlagSet, args []string) (code int, goOn bool) {
	err := flags.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		flags.SetOutput(os.Stdout)
		flags.Usage()
		return exitOK, false
	case err != nil:
		return usageError("%v; see 'devcluster %s --help'", err, flags.Name()), false
	}
	return exitOK, true
}

func usageError(format string, args ...any) int {
	fmt.Fprintf(os.Stderr, "devcluster: "+format+"\n", args...)
	return exitUsage
}

func failed(err error) int {
	fmt.Fprintf(os.Stderr, "devcluster: %v\n", err)
	return exitFailed
}
