package components

import "maps"

// What a node needs besides runs on Linux only.
var nodeTable = map[string]main{
	"coredns":        coreDNS,
	"kube-proxy":     kubeProxy,
	"kube-scheduler": kubeScheduler,
	"kubelet":        kubelet,
}

func init() { maps.Copy(table, nodeTable) }
