package cluster

import (
	"context"
	"fmt"
	"net"
	"os"

	"geminibatch.dev/devcluster/internal/access"
)

const serviceRange = "10.0.0.0/24"

// serviceIP is the address of the "kubernetes" service: the first of the range.
var serviceIP = net.IPv4(10, 0, 0, 1)

func (e *environment) serverURL() string {
	return fmt.Sprintf("https://127.0.0.1:%d", e.ports[portAPIServer].Port)
}

func (e *environment) kubeAPIServer() component {
	port := e.ports[portAPIServer]
	args := []string{
		"--etcd-servers=" + etcdURL(e.ports[portEtcdClient].Port),
		"--bind-address=127.0.0.1",
		fmt.Sprintf("--secure-port=%d", port.Port),
		// Without these two, the server looks for a network interface other
		// than loopback and fails on a machine that has none.
		"--advertise-address=127.0.0.1",
		"--endpoint-reconciler-type=none",
		"--cert-dir=" + e.dir.File("pki"),
		"--tls-cert-file=" + e.pki.ServingCert,
		"--tls-private-key-file=" + e.pki.ServingKey,
		"--token-auth-file=" + e.dir.File(tokenFile),
		"--authorization-mode=RBAC",
		"--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-key-file=" + e.pki.ServiceAccountPub,
		"--service-account-signing-key-file=" + e.pki.ServiceAccountKey,
		"--service-cluster-ip-range=" + serviceRange,
		"--allow-privileged=true",
		"--profiling=false",
	}
	if port.Shared {
		args = append(args, "--permit-port-sharing=true")
	}
	if e.audit {
		args = append(args, auditArgs(e.dir.File(auditPolicyFile), e.dir.File(auditLogFile))...)
	}
	if !e.controllerManager {
		// Nobody makes service accounts, and pods would be refused for want
		// of one.
		args = append(args, "--disable-admission-plugins=ServiceAccount")
	}
	return component{
		name:  "kube-apiserver",
		args:  args,
		grace: apiServerGrace,
		ready: func(ctx context.Context) error {
			if err := e.probe.get(ctx, e.serverURL()+"/readyz"); err != nil {
				return err
			}
			return e.probe.get(ctx, e.serverURL()+"/api/v1/namespaces/default")
		},
	}
}

func (e *environment) writeKubeconfig(path, user string) error {
	ca, err := os.ReadFile(e.pki.CACert)
	if err != nil {
		return err
	}
	return access.Kubeconfig{Server: e.serverURL(), CA: ca, User: user, Token: e.tokens[user]}.Write(path)
}
