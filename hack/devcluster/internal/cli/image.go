package cli

import (
	"context"
	"os"
	"path/filepath"

	"geminibatch.dev/devcluster/internal/image"
	"geminibatch.dev/devcluster/internal/node"
)

const imageUsage = `Usage: devcluster image load --dir DIR FILE...

Gives image archives (as 'docker save', 'buildah push docker-archive:...' or
'make image' write them) to the node of a running cluster; DIR is the directory
its kubeconfig is in. Pods need 'imagePullPolicy: IfNotPresent' or 'Never': the
node reaches no registry.
`

func imageCommand(args []string) int {
	if len(args) == 0 {
		return usageError("'image' needs a command: load; see 'devcluster image load --help'")
	}
	if args[0] == "--help" || args[0] == "-h" {
		args[0] = "load"
		args = append(args, "--help")
	}
	if args[0] != "load" {
		return usageError("unknown command 'image %s'; there is 'image load'", args[0])
	}
	var dir string
	flags := newFlags("image load", imageUsage)
	flags.StringVar(&dir, "dir", "", "the cluster's `directory`")
	if code, goOn := parse(flags, args[1:]); !goOn {
		return code
	}
	switch {
	case dir == "":
		return usageError("--dir is missing; see 'devcluster image load --help'")
	case flags.NArg() == 0:
		return usageError("the archive is missing; see 'devcluster image load --help'")
	}
	programs, err := node.Find()
	if err != nil {
		return failed(err)
	}
	socket := filepath.Join(dir, node.ContainerdSocket)
	if _, err := os.Stat(socket); err != nil {
		return failed(noNode{dir})
	}
	for _, archive := range flags.Args() {
		if err := image.Load(context.Background(), programs.Ctr, socket, archive); err != nil {
			return failed(err)
		}
	}
	return exitOK
}

type noNode struct{ dir string }

func (e noNode) Error() string {
	return "no node in " + e.dir + ": is 'devcluster up --node' running there?"
}
