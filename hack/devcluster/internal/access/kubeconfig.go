package access

import (
	"encoding/base64"
	"fmt"
	"os"
)

// Kubeconfig is what a client needs to reach the API server.
type Kubeconfig struct {
	// Server is the URL of the API server.
	Server string
	// CA is the authority of its certificate, PEM.
	CA []byte
	// User names the entry; Token is the credential.
	User  string
	Token string
}

const kubeconfigFormat = `apiVersion: v1
kind: Config
current-context: devcluster
clusters:
- name: devcluster
  cluster:
    server: %q
    certificate-authority-data: %s
contexts:
- name: devcluster
  context:
    cluster: devcluster
    user: %[3]q
    namespace: default
users:
- name: %[3]q
  user:
    token: %[4]q
`

// Write puts the file in place in one step, readable by its owner only.
func (k Kubeconfig) Write(path string) error {
	content := fmt.Sprintf(kubeconfigFormat, k.Server, base64.StdEncoding.EncodeToString(k.CA), k.User, k.Token)
	next := path + ".new"
	if err := os.WriteFile(next, []byte(content), 0o600); err != nil {
		return err
	}
	return os.Rename(next, path)
}
