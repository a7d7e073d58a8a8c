package cluster

import (
	"context"
	"fmt"
)

func etcdURL(port int) string { return fmt.Sprintf("http://127.0.0.1:%d", port) }

func (e *environment) etcd() component {
	client, peer := e.ports[portEtcdClient], e.ports[portEtcdPeer]
	clientURL, peerURL := etcdURL(client.Port), etcdURL(peer.Port)
	args := []string{
		"--name=devcluster",
		"--data-dir=" + e.dir.File("etcd"),
		"--listen-client-urls=" + clientURL,
		"--advertise-client-urls=" + clientURL,
		"--listen-peer-urls=" + peerURL,
		"--initial-advertise-peer-urls=" + peerURL,
		"--initial-cluster=devcluster=" + peerURL,
		"--unsafe-no-fsync", // the data need not survive a power cut
		"--log-level=warn",
	}
	if client.Shared && peer.Shared {
		args = append(args, "--socket-reuse-port")
	}
	return component{
		name:  "etcd",
		args:  args,
		grace: etcdGrace,
		ready: func(ctx context.Context) error {
			return e.probe.get(ctx, clientURL+"/health")
		},
	}
}
