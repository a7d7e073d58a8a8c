package control

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
)

// Call sends one request and waits for its answer. An error the cluster
// reports comes as an error, next to the state of the components.
func Call(socket string, request Request) ([]Status, error) {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return nil, fmt.Errorf("no cluster answers at %s; is 'devcluster up' running there? (%w)", socket, err)
	}
	defer func() { _ = conn.Close() }()
	if err := json.NewEncoder(conn).Encode(request); err != nil {
		return nil, err
	}
	var response Response
	if err := json.NewDecoder(conn).Decode(&response); err != nil {
		return nil, fmt.Errorf("the cluster went away before it answered: %w", err)
	}
	if response.Error != "" {
		return response.Components, errors.New(response.Error)
	}
	return response.Components, nil
}
