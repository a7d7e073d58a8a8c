// Command devcluster is a Kubernetes control plane in one binary, for tests:
// etcd, kube-apiserver, kube-controller-manager and kubectl, and the commands
// that run them together. See README.md.
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
