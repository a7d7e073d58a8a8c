package components

import (
	"os"

	"k8s.io/component-base/cli"
	"k8s.io/kubernetes/cmd/kube-proxy/app"
)

func kubeProxy() {
	os.Exit(cli.Run(app.NewProxyCommand()))
}
