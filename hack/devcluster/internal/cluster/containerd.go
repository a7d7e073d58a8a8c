package cluster

import (
	"context"
	"time"

	"geminibatch.dev/devcluster/internal/image"
	"geminibatch.dev/devcluster/internal/node"
)

// PauseImage is the name of the image that holds a pod's namespaces open.
const PauseImage = "localhost/devcluster/pause:1"

const (
	containerdConfigFile = "containerd.toml"
	cniDir               = "cni"
	cniConfigFile        = cniDir + "/10-devcluster.conflist"
	containerdGrace      = time.Second
)

// restrict_oom_score_adj: where CAP_SYS_RESOURCE is missing, no sandbox would
// start without it.
const containerdConfig = `version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.devmapper"]
[grpc]
  address = '{{file "containerd.sock"}}'
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{{.PauseImage}}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{{.CNI}}"
    conf_dir = '{{file "cni"}}'
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "{{.Snapshotter}}"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
`

// ptp gives each pod a link of its own to the node: all traffic, also between
// two pods, passes the node's rules. With a bridge the answers would not.
const cniConfig = `{
  "cniVersion": "0.4.0",
  "name": "devcluster",
  "plugins": [
    {
      "type": "ptp",
      "ipam": {
        "type": "host-local",
        "dataDir": "/run/cni-addresses",
        "ranges": [[{"subnet": "{{.PodRange}}"}]],
        "routes": [{"dst": "0.0.0.0/0"}]
      }
    },
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}
`

func (e *environment) containerd() component {
	return component{
		name:  "containerd",
		path:  e.node.Programs.Containerd,
		args:  []string{"--config=" + e.dir.File(containerdConfigFile)},
		grace: containerdGrace,
		ready: func(ctx context.Context) error {
			return image.Load(ctx, e.node.Programs.Ctr, e.dir.File(node.ContainerdSocket), e.node.PauseImage)
		},
	}
}
