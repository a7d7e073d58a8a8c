package cluster

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"
)

// probe asks components whether they are ready.
type probe struct {
	client *http.Client
	token  string
}

func newProbe(caFile, token string) (*probe, error) {
	ca, err := os.ReadFile(caFile)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		return nil, fmt.Errorf("%s holds no certificate", caFile)
	}
	return &probe{
		client: &http.Client{
			Timeout: 5 * time.Second,
			Transport: &http.Transport{
				TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
				// Components come and go, so does every connection. And no
				// proxy: the components are on this machine.
				DisableKeepAlives: true,
			},
		},
		token: token,
	}, nil
}

// get succeeds when the answer is 200.
func (p *probe) get(ctx context.Context, url string) error {
	_, err := p.read(ctx, url)
	return err
}

// read returns what an answer of 200 holds.
func (p *probe) read(ctx context.Context, url string) ([]byte, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	if request.URL.Scheme == "https" {
		request.Header.Set("Authorization", "Bearer "+p.token)
	}
	request.Header.Set("User-Agent", "devcluster")
	response, err := p.client.Do(request)
	if err != nil {
		return nil, err
	}
	defer func() { _ = response.Body.Close() }()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		return nil, err
	}
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("GET %s: %s", request.URL.Path, response.Status)
	}
	return body, nil
}
