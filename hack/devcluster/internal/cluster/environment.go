package cluster

import (
	"net"
	"os"

	"geminibatch.dev/devcluster/internal/access"
	"geminibatch.dev/devcluster/internal/pki"
	"geminibatch.dev/devcluster/internal/ports"
	"geminibatch.dev/devcluster/internal/workdir"
)

// What the ports are for.
const (
	portEtcdClient = "etcd-client"
	portEtcdPeer   = "etcd-peer"
	portAPIServer  = "kube-apiserver"
)

// Files in the cluster's directory, besides those of single components.
const (
	KubeconfigFile = "kubeconfig"
	SocketFile     = "control.sock"

	tokenFile = "tokens.csv"
	portFile  = "ports.json"
)

// ListenOutside listens on the port that the API server is going to have inside
// the namespaces of a node, so that one kubeconfig is right on both sides.
func ListenOutside(dir *workdir.Dir) (net.Listener, error) {
	return ports.Listen(dir.File(portFile), portAPIServer)
}

// environment is what the components are configured from.
type environment struct {
	dir               *workdir.Dir
	pki               pki.Files
	tokens            access.Tokens
	ports             ports.Set
	probe             *probe
	audit             bool
	controllerManager bool
	node              *NodeConfig
}

// newEnvironment makes keys, tokens and files, or takes those already there,
// and reserves ports. With freshPorts the remembered ones are not tried.
func newEnvironment(cfg Config, freshPorts bool) (*environment, error) {
	e := &environment{dir: cfg.Dir, audit: cfg.Audit, controllerManager: cfg.ControllerManager, node: cfg.Node}
	// A file from an earlier run must not look as if this one were ready.
	if err := os.RemoveAll(e.dir.File(KubeconfigFile)); err != nil {
		return nil, err
	}
	var err error
	if e.pki, err = pki.Ensure(e.dir.File("pki"), serviceIP); err != nil {
		return nil, err
	}
	if e.tokens, err = access.EnsureTokens(e.dir.File(tokenFile)); err != nil {
		return nil, err
	}
	if e.probe, err = newProbe(e.pki.CACert, e.tokens[access.Admin]); err != nil {
		return nil, err
	}
	if e.audit {
		if err := os.WriteFile(e.dir.File(auditPolicyFile), auditPolicy, 0o600); err != nil {
			return nil, err
		}
	}
	e.ports, err = ports.ReserveAll(e.dir.File(portFile), freshPorts, portEtcdClient, portEtcdPeer, portAPIServer)
	if err != nil {
		return nil, err
	}
	err = e.writeKubeconfig(e.dir.File(controllerManagerKubeconfig), access.ControllerManager)
	if err == nil && e.node != nil {
		err = e.writeNodeFiles()
	}
	if err != nil {
		e.ports.Release()
		return nil, err
	}
	return e, nil
}

// components lists what makes up the cluster, in the order of starting.
func (e *environment) components() []component {
	list := []component{e.etcd(), e.kubeAPIServer()}
	if e.controllerManager {
		list = append(list, e.kubeControllerManager())
	}
	if e.node != nil {
		list = append(list, e.nodeComponents()...)
	}
	return list
}
