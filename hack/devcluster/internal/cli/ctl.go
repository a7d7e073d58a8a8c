package cli

import (
	"flag"
	"fmt"
	"path/filepath"
	"slices"

	"geminibatch.dev/devcluster/internal/cluster"
	"geminibatch.dev/devcluster/internal/control"
)

const ctlUsage = `Usage: devcluster ctl --dir DIR COMMAND [COMPONENT]

Controls a running cluster; DIR is the directory its kubeconfig is in. Prints
one line for each component: its name, state and process id.

  status              only print the state
  stop COMPONENT      end the process; returns when it has ended
  start COMPONENT     start it again on the same port and data; returns when it
                      is ready
  restart COMPONENT   stop it, then start it
  pause COMPONENT     freeze the process (SIGSTOP): connections hang
  resume COMPONENT    let it go on (SIGCONT)

Components: etcd, kube-apiserver, kube-controller-manager; with a node also
kube-scheduler, coredns, containerd, kubelet, kube-proxy, whose process ids are
those inside its namespaces, as are all others then.
`

func ctl(args []string) int {
	dir, request, code, goOn := parseCtl(args)
	if !goOn {
		return code
	}
	list, err := control.Call(filepath.Join(dir, cluster.SocketFile), request)
	for _, status := range list {
		if status.PID == 0 {
			fmt.Printf("%s %s\n", status.Name, status.State)
		} else {
			fmt.Printf("%s %s %d\n", status.Name, status.State, status.PID)
		}
	}
	if err != nil {
		return failed(err)
	}
	return exitOK
}

func parseCtl(args []string) (dir string, request control.Request, code int, goOn bool) {
	flags := newFlags("ctl", ctlUsage)
	flags.StringVar(&dir, "dir", "", "the cluster's `directory`")
	if code, goOn = parse(flags, args); !goOn {
		return "", request, code, false
	}
	if message := ctlRequest(flags, dir, &request); message != "" {
		return "", request, usageError("%s; see 'devcluster ctl --help'", message), false
	}
	return dir, request, exitOK, true
}

// ctlRequest returns what is wrong with the arguments.
func ctlRequest(flags *flag.FlagSet, dir string, request *control.Request) string {
	if dir == "" {
		return "--dir is missing"
	}
	if flags.NArg() == 0 {
		return "the command is missing"
	}
	request.Command, request.Component = control.Command(flags.Arg(0)), flags.Arg(1)
	wanted := 2
	if request.Command == control.ListStatus {
		wanted = 1
	}
	switch {
	case !slices.Contains(control.Commands, request.Command):
		return fmt.Sprintf("unknown command %q", flags.Arg(0))
	case flags.NArg() < wanted:
		return fmt.Sprintf("'%s' needs a component", request.Command)
	case flags.NArg() > wanted:
		return fmt.Sprintf("unexpected argument %q", flags.Arg(wanted))
	}
	return ""
}
