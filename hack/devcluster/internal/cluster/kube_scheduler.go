package cluster

import (
	"context"
	"time"
)

const schedulerGrace = 500 * time.Millisecond

func (e *environment) kubeScheduler() component {
	return component{
		name: "kube-scheduler",
		args: []string{
			"--kubeconfig=" + e.dir.File(schedulerKubeconfig),
			"--authentication-kubeconfig=" + e.dir.File(schedulerKubeconfig),
			"--authorization-kubeconfig=" + e.dir.File(schedulerKubeconfig),
			"--leader-elect=false",
			"--bind-address=127.0.0.1",
			"--secure-port=10259",
			"--tls-cert-file=" + e.pki.ServingCert,
			"--tls-private-key-file=" + e.pki.ServingKey,
			"--profiling=false",
		},
		grace: schedulerGrace,
		ready: func(ctx context.Context) error {
			return e.probe.get(ctx, "https://127.0.0.1:10259/healthz")
		},
	}
}
