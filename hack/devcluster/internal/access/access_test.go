package access

import (
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"k8s.io/client-go/tools/clientcmd"
)

func TestTokensAreMadeOnceAndReadBack(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tokens.csv")
	made, err := EnsureTokens(path)
	if err != nil {
		t.Fatal(err)
	}
	read, err := EnsureTokens(path)
	if err != nil {
		t.Fatal(err)
	}
	if !maps.Equal(made, read) || len(made[Admin]) != 48 || made[Admin] == made[ControllerManager] {
		t.Errorf("made %v, read %v", made, read)
	}
	content, _ := os.ReadFile(path)
	if !strings.Contains(string(content), made[Admin]+",devcluster-admin,devcluster-admin,system:masters\n") {
		t.Errorf("the admin is not in system:masters:\n%s", content)
	}
}

func TestMissingTokensAreAdded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tokens.csv")
	if err := os.WriteFile(path, []byte("abc,devcluster-admin,devcluster-admin,system:masters\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	tokens, err := EnsureTokens(path)
	if err != nil || tokens[Admin] != "abc" || tokens[Node] == "" {
		t.Errorf("got %v, %v; want the token that was there, and the others", tokens, err)
	}
	again, err := EnsureTokens(path)
	if err != nil || !maps.Equal(tokens, again) {
		t.Errorf("read back: %v, %v", again, err)
	}
}

func TestKubeconfigIsWhatClientsExpect(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kubeconfig")
	config := Kubeconfig{Server: "https://127.0.0.1:6443", CA: []byte("ca"), User: ControllerManager, Token: "secret"}
	if err := config.Write(path); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	rest, err := clientcmd.BuildConfigFromFlags("", path)
	if err != nil {
		t.Fatal(err)
	}
	if rest.Host != config.Server || string(rest.CAData) != "ca" || rest.BearerToken != "secret" || rest.Insecure {
		t.Errorf("read back: %s", rest)
	}
}
