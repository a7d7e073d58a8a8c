// Command testpod is what the tests run in pods. It is the only program in its
// image.
//
//	testpod serve        answers HTTP on port 8080
//	testpod get URL      prints what the URL answers
//	testpod lookup NAME  prints the addresses of a name
//	testpod apiserver    prints the version of the API server, asked as a pod should
package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"
)

const accountDir = "/var/run/secrets/kubernetes.io/serviceaccount/"

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "testpod:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 1 && args[0] == "serve":
		return serve()
	case len(args) == 2 && args[0] == "get":
		return get(http.DefaultTransport, args[1], "")
	case len(args) == 2 && args[0] == "lookup":
		addresses, err := net.LookupHost(args[1])
		fmt.Println(strings.Join(addresses, " "))
		return err
	case len(args) == 1 && args[0] == "apiserver":
		return apiserver()
	}
	return errors.New("usage: testpod serve | get URL | lookup NAME | apiserver")
}

func serve() error {
	fmt.Println("serving as user", os.Getuid())
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		fmt.Println("request from", r.RemoteAddr)
		name, _ := os.Hostname()
		_, _ = fmt.Fprintln(w, "hello from", name)
	})
	server := &http.Server{Addr: ":8080", ReadHeaderTimeout: 5 * time.Second}
	return server.ListenAndServe()
}

// apiserver uses what every pod is given: a name, a certificate and a token.
func apiserver() error {
	ca, err := os.ReadFile(accountDir + "ca.crt")
	if err != nil {
		return err
	}
	token, err := os.ReadFile(accountDir + "token")
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}}
	return get(transport, "https://kubernetes.default.svc.cluster.local/api/v1/namespaces/default/configmaps/kube-root-ca.crt", string(token))
}

func get(transport http.RoundTripper, url, token string) error {
	request, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	if token != "" {
		request.Header.Set("Authorization", "Bearer "+token)
	}
	client := http.Client{Transport: transport, Timeout: 10 * time.Second}
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer func() { _ = response.Body.Close() }()
	if _, err := io.Copy(os.Stdout, response.Body); err != nil {
		return err
	}
	if response.StatusCode != http.StatusOK {
		return errors.New(response.Status)
	}
	return nil
}
