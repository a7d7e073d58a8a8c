package cli

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"

	"geminibatch.dev/devcluster/internal/assets"
)

const execUsage = `Usage: devcluster exec PROGRAM [args...]

Runs one of the programs inside, or the one KUBEBUILDER_ASSETS holds instead.
Programs: %s.
`

func execProgram(args []string, programs Programs) int {
	if len(args) > 0 && (args[0] == "--help" || args[0] == "-h") {
		fmt.Printf(execUsage, strings.Join(programs.Names, ", "))
		return exitOK
	}
	if len(args) == 0 {
		return usageError("'exec' needs a program: %s", strings.Join(programs.Names, ", "))
	}
	name := args[0]
	if !slices.Contains(programs.Names, name) {
		return usageError("no program %q inside: there are %s", name, strings.Join(programs.Names, ", "))
	}
	finder, err := assets.FromEnv()
	if err != nil {
		return failed(err)
	}
	program, err := finder.Find(name)
	if err != nil {
		return failed(err)
	}
	if program.BuiltIn {
		programs.Run(name, args[1:])
	}
	err = syscall.Exec(program.Path, append([]string{program.Arg0}, args[1:]...), os.Environ())
	return failed(fmt.Errorf("cannot run %s: %w", program.Path, err))
}
