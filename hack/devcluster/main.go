// Command devcluster is a Kubernetes cluster in one binary, for tests: a control
// plane, what a node needs, kubectl, and the commands that run them together.
// See README.md.
package main

import (
	"os"

	"geminibatch.dev/devcluster/internal/cli"
	"geminibatch.dev/devcluster/internal/components"
)

func main() {
	os.Exit(cli.Main(os.Args, cli.Programs{
		Names: components.Names(),
		Run:   components.Run,
	}))
}
