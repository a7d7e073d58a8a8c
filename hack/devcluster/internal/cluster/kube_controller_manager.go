package cluster

import "context"

const controllerManagerKubeconfig = "kube-controller-manager.kubeconfig"

func (e *environment) kubeControllerManager() component {
	const inDefault = "/api/v1/namespaces/default"
	return component{
		name: "kube-controller-manager",
		args: []string{
			"--kubeconfig=" + e.dir.File(controllerManagerKubeconfig),
			"--use-service-account-credentials=true",
			"--service-account-private-key-file=" + e.pki.ServiceAccountKey,
			"--root-ca-file=" + e.pki.CACert,
			"--leader-elect=false",
			"--secure-port=0",
			"--profiling=false",
			// Tests wait for namespaces to go; the default of 20 requests
			// a second is for shared clusters.
			"--kube-api-qps=300",
			"--kube-api-burst=600",
		},
		grace: controllerManagerGrace,
		ready: func(ctx context.Context) error {
			if err := e.probe.get(ctx, e.serverURL()+inDefault+"/serviceaccounts/default"); err != nil {
				return err
			}
			return e.probe.get(ctx, e.serverURL()+inDefault+"/configmaps/kube-root-ca.crt")
		},
	}
}
