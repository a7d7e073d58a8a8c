package cluster

import (
	"context"
	"net"
	"time"

	"geminibatch.dev/devcluster/internal/access"
	"geminibatch.dev/devcluster/internal/node"
)

const (
	kubeletConfigFile = "kubelet.yaml"
	kubeletGrace      = time.Second
)

// Its directories are in /var/lib, /var/log and /run, which are the cluster's
// own inside. Images are loaded by hand: they are never thrown away to make
// room (imageGCHighThresholdPercent).
const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: {{.Address}}
containerRuntimeEndpoint: unix://{{file "containerd.sock"}}
authentication:
  anonymous:
    enabled: false
  webhook:
    enabled: true
  x509:
    clientCAFile: {{.CA}}
authorization:
  mode: Webhook
failCgroupV1: false
failSwapOn: false
cgroupDriver: cgroupfs
cgroupRoot: {{.CgroupRoot}}
enforceNodeAllocatable: []
evictionHard:
  memory.available: 50Mi
  nodefs.available: 1%
  nodefs.inodesFree: 1%
  imagefs.available: 1%
imageGCHighThresholdPercent: 100
clusterDNS: ["{{.Address}}"]
clusterDomain: cluster.local
resolvConf: ""
volumePluginDir: /var/lib/kubelet/volume-plugins
`

func (e *environment) kubelet() component {
	return component{
		name: "kubelet",
		args: []string{
			"--config=" + e.dir.File(kubeletConfigFile),
			"--kubeconfig=" + e.dir.File(kubeletKubeconfig),
			"--hostname-override=" + access.NodeName,
			"--node-ip=" + node.Address,
		},
		grace: kubeletGrace,
		ready: func(ctx context.Context) error {
			// After a restart the node still counts as ready for a while: it
			// must take requests as well.
			connection, err := new(net.Dialer).DialContext(ctx, "tcp4", net.JoinHostPort(node.Address, "10250"))
			if err != nil {
				return err
			}
			_ = connection.Close()
			return e.nodeReady(ctx)
		},
	}
}
