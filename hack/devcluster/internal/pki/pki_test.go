package pki

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"net"
	"os"
	"testing"
)

func TestServingCertificateIsTrustedForEveryName(t *testing.T) {
	files, err := Ensure(t.TempDir(), net.IPv4(10, 0, 0, 1))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	ca, err := os.ReadFile(files.CACert)
	if err != nil || !roots.AppendCertsFromPEM(ca) {
		t.Fatalf("the CA file holds no certificate: %v", err)
	}
	pair, err := tls.LoadX509KeyPair(files.ServingCert, files.ServingKey)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"127.0.0.1", "10.0.0.1", "localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"} {
		_, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: name})
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestKubeletTrustsTheAPIServer(t *testing.T) {
	files, err := Ensure(t.TempDir(), net.IPv4(10, 0, 0, 1))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	ca, err := os.ReadFile(files.CACert)
	if err != nil || !roots.AppendCertsFromPEM(ca) {
		t.Fatalf("the CA file holds no certificate: %v", err)
	}
	pair, err := tls.LoadX509KeyPair(files.KubeletClientCert, files.KubeletClientKey)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		t.Error(err)
	}
	if groups := pair.Leaf.Subject.Organization; len(groups) != 1 || groups[0] != "system:masters" {
		t.Errorf("groups %v", groups)
	}
}

func TestEnsureKeepsWhatIsThere(t *testing.T) {
	dir := t.TempDir()
	read := func() []byte {
		t.Helper()
		files, err := Ensure(dir, net.IPv4(10, 0, 0, 1))
		if err != nil {
			t.Fatal(err)
		}
		content, err := os.ReadFile(files.ServiceAccountKey)
		if err != nil {
			t.Fatal(err)
		}
		return content
	}
	if first := read(); !bytes.Equal(first, read()) {
		t.Error("the second call made a new key")
	}
}
