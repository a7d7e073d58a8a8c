package cluster

import (
	"context"
	"time"
)

const (
	corefile = "Corefile"
	dnsGrace = 500 * time.Millisecond
)

// It runs on the node's address, not in pods. There are no names but the
// cluster's, since no network but the cluster's.
const dnsConfig = `. {
    bind {{.Address}}
    errors
    ready 127.0.0.1:8181
    kubernetes cluster.local in-addr.arpa ip6.arpa {
        kubeconfig {{file "coredns.kubeconfig"}}
        pods insecure
        fallthrough in-addr.arpa ip6.arpa
        ttl 0
    }
    template ANY ANY {
        rcode NXDOMAIN
    }
}
`

func (e *environment) coreDNS() component {
	return component{
		name:  "coredns",
		args:  []string{"-conf=" + e.dir.File(corefile)},
		grace: dnsGrace,
		ready: func(ctx context.Context) error {
			return e.probe.get(ctx, "http://127.0.0.1:8181/ready")
		},
	}
}
