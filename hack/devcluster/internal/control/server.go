package control

import (
	"context"
	"encoding/json"
	"net"
	"os"
	"time"
)

// requestTimeout bounds how long a client may take to send its request.
const requestTimeout = 5 * time.Second

// Cluster is what the server controls.
type Cluster interface {
	Status() []Status
	Operate(ctx context.Context, command Command, component string) error
}

// Serve answers requests on the socket until the returned function is called.
// The context ends commands under way.
func Serve(ctx context.Context, socket string, cluster Cluster) (closer func(), err error) {
	// The directory is ours alone; what is there is of an earlier run.
	if err := os.RemoveAll(socket); err != nil {
		return nil, err
	}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(socket, 0o600); err != nil {
		_ = listener.Close()
		return nil, err
	}
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go answer(ctx, conn, cluster)
		}
	}()
	return func() { _ = listener.Close() }, nil
}

func answer(ctx context.Context, conn net.Conn, cluster Cluster) {
	defer func() { _ = conn.Close() }()
	_ = conn.SetReadDeadline(time.Now().Add(requestTimeout))
	var request Request
	var response Response
	err := json.NewDecoder(conn).Decode(&request)
	if err == nil && request.Command != ListStatus {
		err = cluster.Operate(ctx, request.Command, request.Component)
	}
	if err != nil {
		response.Error = err.Error()
	}
	response.Components = cluster.Status()
	_ = json.NewEncoder(conn).Encode(response)
}
