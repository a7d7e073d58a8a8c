package control

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

type fake struct{ calls []string }

func (f *fake) Status() []Status {
	return []Status{{Name: "etcd", State: Running, PID: 7}}
}

func (f *fake) Operate(_ context.Context, command Command, component string) error {
	f.calls = append(f.calls, string(command)+" "+component)
	if component != "etcd" {
		return errors.New("no such component")
	}
	return nil
}

func TestCallReachesTheCluster(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	cluster := &fake{}
	closer, err := Serve(context.Background(), socket, cluster)
	if err != nil {
		t.Fatal(err)
	}
	defer closer()

	for _, request := range []Request{{Command: ListStatus}, {Command: Stop, Component: "etcd"}} {
		got, err := Call(socket, request)
		if err != nil || !slices.Equal(got, cluster.Status()) {
			t.Errorf("%+v: %v, %v", request, got, err)
		}
	}
	if _, err := Call(socket, Request{Command: Pause, Component: "x"}); err == nil || err.Error() != "no such component" {
		t.Errorf("error %v", err)
	}
	if want := []string{"stop etcd", "pause x"}; !slices.Equal(cluster.calls, want) {
		t.Errorf("calls %v, want %v", cluster.calls, want)
	}
}

func TestCallWithoutCluster(t *testing.T) {
	_, err := Call(filepath.Join(t.TempDir(), "s"), Request{Command: ListStatus})
	if err == nil || !strings.Contains(err.Error(), "is 'devcluster up' running there?") {
		t.Errorf("error %v", err)
	}
}
