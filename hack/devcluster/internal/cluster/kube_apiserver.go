package cluster

import (
	"context"
	"fmt"
	"net"
	"os"

	"geminibatch.dev/devcluster/internal/access"
	"geminibatch.dev/devcluster/internal/node"
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
		fmt.Sprintf("--secure-port=%d", port.Port),
		"--cert-dir=" + e.dir.File("pki"),
		"--tls-cert-file=" + e.pki.ServingCert,
		"--tls-private-key-file=" + e.pki.ServingKey,
		"--token-auth-file=" + e.dir.File(tokenFile),
		"--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-key-file=" + e.pki.ServiceAccountPub,
		"--service-account-signing-key-file=" + e.pki.ServiceAccountKey,
		"--service-cluster-ip-range=" + serviceRange,
		"--allow-privileged=true",
		"--profiling=false",
	}
	args = append(args, e.apiServerNetwork()...)
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

// apiServerNetwork says where it is reached, and by whom.
func (e *environment) apiServerNetwork() []string {
	if e.node == nil {
		return []string{
			"--bind-address=127.0.0.1",
			// Without these two, the server looks for a network interface
			// other than loopback and fails on a machine that has none.
			"--advertise-address=127.0.0.1",
			"--endpoint-reconciler-type=none",
			"--authorization-mode=RBAC",
		}
	}
	return []string{
		"--bind-address=0.0.0.0",
		"--advertise-address=" + node.Address,
		"--authorization-mode=Node,RBAC",
		"--enable-admission-plugins=NodeRestriction",
		// For logs, exec and port-forward it asks kubelet.
		"--kubelet-preferred-address-types=InternalIP",
		"--kubelet-client-certificate=" + e.pki.KubeletClientCert,
		"--kubelet-client-key=" + e.pki.KubeletClientKey,
	}
}

func (e *environment) writeKubeconfig(path, user string) error {
	ca, err := os.ReadFile(e.pki.CACert)
	if err != nil {
		return err
	}
	return access.Kubeconfig{Server: e.serverURL(), CA: ca, User: user, Token: e.tokens[user]}.Write(path)
}
