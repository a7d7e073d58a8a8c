// Package access holds who may talk to the API server: the token file the API
// server reads and the kubeconfig files made from it.
package access

import (
	"crypto/rand"
	"encoding/csv"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
)

// Users with a token of their own.
const (
	Admin             = "devcluster-admin"
	ControllerManager = "system:kube-controller-manager"
	Scheduler         = "system:kube-scheduler"
	Node              = "system:node:" + NodeName
	Proxy             = "system:kube-proxy"
	DNS               = "devcluster-dns"
)

// NodeName is what the node is called: its user name says so.
const NodeName = "devcluster"

// groups says which groups a user is in besides system:authenticated.
var groups = map[string]string{
	Admin:             "system:masters",
	ControllerManager: "",
	Scheduler:         "",
	Node:              "system:nodes",
	Proxy:             "",
	// There is no ready-made role for a name server; this one reads Services,
	// and is as much a part of the control plane as the rest.
	DNS: "system:masters",
}

// Tokens maps a user to its bearer token.
type Tokens map[string]string

// EnsureTokens reads the API server's token file, and makes it, or the tokens
// that are missing in it.
func EnsureTokens(path string) (Tokens, error) {
	tokens, err := readTokens(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	complete := true
	for user := range groups {
		if tokens[user] == "" {
			complete = false
			secret := make([]byte, 24)
			if _, err := rand.Read(secret); err != nil {
				return nil, err
			}
			tokens[user] = hex.EncodeToString(secret)
		}
	}
	if complete {
		return tokens, nil
	}
	return tokens, writeTokens(path, tokens)
}

func writeTokens(path string, tokens Tokens) error {
	var file strings.Builder
	writer := csv.NewWriter(&file)
	for user, group := range groups {
		record := []string{tokens[user], user, user}
		if group != "" {
			record = append(record, group)
		}
		if err := writer.Write(record); err != nil {
			return err
		}
	}
	writer.Flush()
	return os.WriteFile(path, []byte(file.String()), 0o600)
}

func readTokens(path string) (Tokens, error) {
	tokens := Tokens{}
	file, err := os.Open(path)
	if err != nil {
		return tokens, err
	}
	defer func() { _ = file.Close() }()
	reader := csv.NewReader(file)
	reader.FieldsPerRecord = -1
	records, err := reader.ReadAll()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	for _, record := range records {
		if len(record) >= 2 {
			tokens[record[1]] = record[0]
		}
	}
	return tokens, nil
}
