// Package components holds the entry points of the programs built into the
// devcluster binary. It is the only package that links Kubernetes, etcd and CoreDNS;
// everything else stays quick to build and test.
//
// Each program has a file of its own. To add one, write that file and name it
// in the table below, or in the one of node_linux.go.
package components

import (
	"os"
	"sort"
)

// main runs one program. It reads os.Args the way the stand-alone program
// would, and normally ends the process itself.
type main func()

var table = map[string]main{
	"etcd":                    etcd,
	"kube-apiserver":          kubeAPIServer,
	"kube-controller-manager": kubeControllerManager,
	"kubectl":                 kubectl,
}

// Names lists the built-in programs in alphabetical order.
func Names() []string {
	names := make([]string, 0, len(table))
	for name := range table {
		names = append(names, name)
	}
	sort.Strings(names)
	return names
}

// Run becomes the named program with the given arguments and does not return.
// The name also becomes os.Args[0]: client-go derives the user agent from it.
func Run(name string, args []string) {
	os.Args = append([]string{name}, args...)
	table[name]()
	os.Exit(0)
}
