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
)

// groups says which groups a user is in besides system:authenticated.
var groups = map[string]string{
	Admin:             "system:masters",
	ControllerManager: "",
}

// Tokens maps a user to its bearer token.
type Tokens map[string]string

// EnsureTokens reads the API server's token file, and makes it when missing.
func EnsureTokens(path string) (Tokens, error) {
	tokens, err := readTokens(path)
	if errors.Is(err, fs.ErrNotExist) {
		return makeTokens(path)
	}
	return tokens, err
}

func makeTokens(path string) (Tokens, error) {
	tokens := Tokens{}
	var file strings.Builder
	writer := csv.NewWriter(&file)
	for user, group := range groups {
		secret := make([]byte, 24)
		if _, err := rand.Read(secret); err != nil {
			return nil, err
		}
		tokens[user] = hex.EncodeToString(secret)
		record := []string{tokens[user], user, user}
		if group != "" {
			record = append(record, group)
		}
		if err := writer.Write(record); err != nil {
			return nil, err
		}
	}
	writer.Flush()
	return tokens, os.WriteFile(path, []byte(file.String()), 0o600)
}

func readTokens(path string) (Tokens, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	reader := csv.NewReader(file)
	reader.FieldsPerRecord = -1
	records, err := reader.ReadAll()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	tokens := Tokens{}
	for _, record := range records {
		if len(record) >= 2 {
			tokens[record[1]] = record[0]
		}
	}
	for user := range groups {
		if tokens[user] == "" {
			return nil, fmt.Errorf("%s has no token for %s: remove the directory to start afresh", path, user)
		}
	}
	return tokens, nil
}
