// Package pki makes the keys and certificates of a cluster: a certificate
// authority, the API server's certificates towards its clients and towards
// kubelet, and the key pair that signs service account tokens. They are for
// local tests and live as long as the cluster's directory.
package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

const validity = 10 * 365 * 24 * time.Hour

// Files are the paths of what Ensure made.
type Files struct {
	CACert            string
	ServingCert       string
	ServingKey        string
	KubeletClientCert string
	KubeletClientKey  string
	ServiceAccountKey string
	ServiceAccountPub string
}

// Ensure makes the files in dir, or keeps them when they are all there.
func Ensure(dir string, serviceIP net.IP) (Files, error) {
	files := Files{
		CACert:            filepath.Join(dir, "ca.crt"),
		ServingCert:       filepath.Join(dir, "apiserver.crt"),
		ServingKey:        filepath.Join(dir, "apiserver.key"),
		KubeletClientCert: filepath.Join(dir, "kubelet-client.crt"),
		KubeletClientKey:  filepath.Join(dir, "kubelet-client.key"),
		ServiceAccountKey: filepath.Join(dir, "service-account.key"),
		ServiceAccountPub: filepath.Join(dir, "service-account.pub"),
	}
	if files.complete() {
		return files, nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return Files{}, err
	}
	if err := files.writeCertificates(serviceIP); err != nil {
		return Files{}, fmt.Errorf("making the certificates: %w", err)
	}
	if err := files.writeServiceAccount(); err != nil {
		return Files{}, fmt.Errorf("making the service account key: %w", err)
	}
	return files, nil
}

func (f Files) complete() bool {
	for _, path := range []string{f.CACert, f.ServingCert, f.ServingKey, f.KubeletClientCert, f.KubeletClientKey,
		f.ServiceAccountKey, f.ServiceAccountPub} {
		if info, err := os.Stat(path); err != nil || info.Size() == 0 {
			return false
		}
	}
	return true
}

// writeCertificates makes the authority and what it signs. The authority's key
// is not kept: nothing else is to be signed with it.
func (f Files) writeCertificates(serviceIP net.IP) error {
	caKey, err := newKey()
	if err != nil {
		return err
	}
	now := time.Now()
	ca := &x509.Certificate{
		SerialNumber:          big.NewInt(now.UnixNano()),
		Subject:               pkix.Name{CommonName: "devcluster-ca"},
		NotBefore:             now.Add(-24 * time.Hour),
		NotAfter:              now.Add(validity),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey)
	if err != nil {
		return err
	}
	if ca, err = x509.ParseCertificate(caDER); err != nil {
		return err
	}
	serving := &x509.Certificate{
		SerialNumber: big.NewInt(now.UnixNano() + 1),
		Subject:      pkix.Name{CommonName: "kube-apiserver"},
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		DNSNames: []string{"localhost", "kubernetes", "kubernetes.default",
			"kubernetes.default.svc", "kubernetes.default.svc.cluster.local"},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), serviceIP},
	}
	// With this one the API server asks kubelet for logs and the like.
	kubeletClient := &x509.Certificate{
		SerialNumber: big.NewInt(now.UnixNano() + 2),
		Subject:      pkix.Name{CommonName: "kube-apiserver-kubelet-client", Organization: []string{"system:masters"}},
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	return firstError(
		writePEM(f.CACert, "CERTIFICATE", caDER),
		writeSigned(f.ServingCert, f.ServingKey, serving, ca, caKey),
		writeSigned(f.KubeletClientCert, f.KubeletClientKey, kubeletClient, ca, caKey),
	)
}

// writeSigned makes a key and its certificate, as valid as the authority's.
func writeSigned(certFile, keyFile string, template, ca *x509.Certificate, caKey *ecdsa.PrivateKey) error {
	key, err := newKey()
	if err != nil {
		return err
	}
	template.NotBefore, template.NotAfter, template.KeyUsage = ca.NotBefore, ca.NotAfter, x509.KeyUsageDigitalSignature
	der, err := x509.CreateCertificate(rand.Reader, template, ca, key.Public(), caKey)
	if err != nil {
		return err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return firstError(
		writePEM(certFile, "CERTIFICATE", der),
		writePEM(keyFile, "PRIVATE KEY", keyDER),
	)
}

func (f Files) writeServiceAccount() error {
	key, err := newKey()
	if err != nil {
		return err
	}
	private, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	return firstError(
		writePEM(f.ServiceAccountKey, "EC PRIVATE KEY", private),
		writePEM(f.ServiceAccountPub, "PUBLIC KEY", public),
	)
}

func newKey() (*ecdsa.PrivateKey, error) {
	return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
}

func writePEM(path, kind string, der []byte) error {
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}

func firstError(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
