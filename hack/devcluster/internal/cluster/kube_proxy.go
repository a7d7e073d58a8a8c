package cluster

import (
	"context"
	"time"
)

const (
	proxyConfigFile = "kube-proxy.yaml"
	proxyGrace      = 500 * time.Millisecond
)

// Limits of the machine's connection tracking cannot be changed from inside a
// network namespace: zero leaves them.
const proxyConfig = `apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: iptables
clientConnection:
  kubeconfig: {{file "kube-proxy.kubeconfig"}}
hostnameOverride: {{.NodeName}}
clusterCIDR: {{.PodRange}}
healthzBindAddress: 127.0.0.1:10256
metricsBindAddress: 127.0.0.1:10249
iptables:
  minSyncPeriod: 100ms
conntrack:
  maxPerCore: 0
  min: 0
  tcpEstablishedTimeout: 0s
  tcpCloseWaitTimeout: 0s
`

func (e *environment) kubeProxy() component {
	return component{
		name:  "kube-proxy",
		args:  []string{"--config=" + e.dir.File(proxyConfigFile)},
		grace: proxyGrace,
		ready: func(ctx context.Context) error {
			return e.probe.get(ctx, "http://127.0.0.1:10256/livez")
		},
	}
}
