package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"text/template"

	"geminibatch.dev/devcluster/internal/access"
	"geminibatch.dev/devcluster/internal/node"
)

// ServiceRange holds the addresses of Services.
const ServiceRange = serviceRange

// NodeConfig adds a node to the cluster. The cluster must then run inside of
// its namespaces.
type NodeConfig struct {
	Programs node.Programs
	// PauseImage is an image archive.
	PauseImage string
}

const (
	schedulerKubeconfig = "kube-scheduler.kubeconfig"
	kubeletKubeconfig   = "kubelet.kubeconfig"
	proxyKubeconfig     = "kube-proxy.kubeconfig"
	dnsKubeconfig       = "coredns.kubeconfig"
)

// nodeComponents lists what a node and its pods need, in the order of starting.
func (e *environment) nodeComponents() []component {
	return []component{e.kubeScheduler(), e.coreDNS(), e.containerd(), e.kubelet(), e.kubeProxy()}
}

// writeNodeFiles writes what the components of a node read.
func (e *environment) writeNodeFiles() error {
	for file, user := range map[string]string{
		schedulerKubeconfig: access.Scheduler,
		kubeletKubeconfig:   access.Node,
		proxyKubeconfig:     access.Proxy,
		dnsKubeconfig:       access.DNS,
	} {
		if err := e.writeKubeconfig(e.dir.File(file), user); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(e.dir.File(cniDir), 0o700); err != nil {
		return err
	}
	for file, content := range map[string]string{
		containerdConfigFile: containerdConfig,
		cniConfigFile:        cniConfig,
		kubeletConfigFile:    kubeletConfig,
		proxyConfigFile:      proxyConfig,
		corefile:             dnsConfig,
	} {
		if err := e.writeTemplate(file, content); err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
	}
	return nil
}

// writeTemplate writes a configuration file. In it, {{file "NAME"}} is the path
// of a file in the cluster's directory.
func (e *environment) writeTemplate(file, content string) error {
	parsed, err := template.New(file).Funcs(template.FuncMap{"file": e.dir.File}).Parse(content)
	if err != nil {
		return err
	}
	var text strings.Builder
	err = parsed.Execute(&text, map[string]string{
		"NodeName":    access.NodeName,
		"Address":     node.Address,
		"PodRange":    node.PodRange,
		"CNI":         e.node.Programs.CNI,
		"Snapshotter": snapshotter(e.dir.Path),
		"PauseImage":  PauseImage,
		"CgroupRoot":  node.CgroupRoot(e.dir.Path),
		"CA":          e.pki.CACert,
	})
	if err != nil {
		return err
	}
	return os.WriteFile(e.dir.File(file), []byte(text.String()), 0o600)
}

// nodeReady fails until the node says that pods can run on it.
func (e *environment) nodeReady(ctx context.Context) error {
	body, err := e.probe.read(ctx, e.serverURL()+"/api/v1/nodes/"+access.NodeName)
	if err != nil {
		return err
	}
	var object struct {
		Status struct {
			Conditions []struct{ Type, Status, Message string }
		}
	}
	if err := json.Unmarshal(body, &object); err != nil {
		return err
	}
	for _, condition := range object.Status.Conditions {
		if condition.Type == "Ready" {
			if condition.Status == "True" {
				return nil
			}
			return fmt.Errorf("the node is not ready: %s", condition.Message)
		}
	}
	return fmt.Errorf("the node has not said whether it is ready")
}
