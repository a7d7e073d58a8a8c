// Package node gives a cluster a machine of its own to run pods on: namespaces
// with their own processes, mounts and network, so that kubelet, containerd and
// kube-proxy find a machine that is theirs, and this one stays as it is.
//
//	devcluster up --node        the supervisor: makes the namespaces, removes what is left
//	  devcluster node-init      process 1 in there: mounts, network, buries orphans
//	    devcluster node-run     runs the components, as 'up' does without a node
//	      etcd, kube-apiserver, ... containerd, kubelet, kube-proxy
//
// When process 1 ends, however it ends, the kernel kills everything in there,
// and mounts and network go with it. What remains are cgroup directories and
// files in the cluster's directory; CleanUp removes them, also those of a
// supervisor that was killed.
package node

import "net"

// The addresses inside. They are the same in every cluster: nobody outside
// sees them.
const (
	Address    = "10.250.0.1"
	PodRange   = "10.244.0.0/16"
	addressLen = 32
)

// hostname is what the machine inside is called.
const hostname = "devcluster"

// Paths inside the cluster's directory.
const (
	// ContainerdSocket is reached from outside too: a socket file is not bound
	// to a network namespace.
	ContainerdSocket = "containerd.sock"

	markerFile = "node.json"
	filesDir   = "node" // what is mounted over the machine's directories
)

// Spec says what to run in the namespaces.
type Spec struct {
	// Dir is the cluster's directory.
	Dir string
	// Args are the arguments of 'node-run'. It has Listener as its file
	// descriptor ListenerFD.
	Args     []string
	Listener *net.TCPListener
	// ServiceRange holds the addresses of Services.
	ServiceRange string
}

// ListenerFD is the file descriptor of the listener in 'node-run'.
const ListenerFD = 3
