package cli

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
)

// versioned lists the modules the programs come from.
var versioned = []struct{ label, module string }{
	{"kubernetes", "k8s.io/kubernetes"},
	{"etcd", "go.etcd.io/etcd/server/v3"},
	{"coredns", "github.com/coredns/coredns"},
}

func version() int {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return failed(errors.New("this binary holds no build information"))
	}
	printVersions(os.Stdout, info)
	return exitOK
}

func printVersions(to io.Writer, info *debug.BuildInfo) {
	for _, entry := range versioned {
		for _, module := range info.Deps {
			if module.Path == entry.module {
				_, _ = fmt.Fprintf(to, "%s %s\n", entry.label, module.Version)
			}
		}
	}
	_, _ = fmt.Fprintf(to, "go %s\n", info.GoVersion)
}
