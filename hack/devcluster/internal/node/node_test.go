package node

import (
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestCheckPaths(t *testing.T) {
	dir := t.TempDir()
	if err := CheckPaths(map[string]string{"the directory": dir}); err != nil {
		t.Errorf("%s: %v", dir, err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink("/var/lib", link); err != nil {
		t.Fatal(err)
	}
	for _, hidden := range []string{"/var/lib", link, link + "/not/there/yet"} {
		err := CheckPaths(map[string]string{"the directory": hidden})
		if err == nil || !strings.Contains(err.Error(), "the directory, "+hidden+", is under /var/lib") {
			t.Errorf("%s: error %v", hidden, err)
		}
	}
}

func TestFindCNI(t *testing.T) {
	incomplete, complete := t.TempDir(), t.TempDir()
	for i, plugin := range cniPlugins {
		for _, dir := range []string{incomplete, complete} {
			if i == 0 && dir == incomplete {
				continue
			}
			if err := os.WriteFile(filepath.Join(dir, plugin), nil, 0o700); err != nil {
				t.Fatal(err)
			}
		}
	}
	if got := findCNI([]string{"/nonexistent", incomplete, complete}); got != complete {
		t.Errorf("found %q, want %q", got, complete)
	}
	if got := findCNI([]string{incomplete}); got != "" {
		t.Errorf("found %q, where %s is missing", got, cniPlugins[0])
	}
}

func TestForward(t *testing.T) {
	server, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	outside, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = outside.Close() }()
	go Forward(outside, server.Addr().String())
	go func() { // repeats what it has heard once the other side is silent
		connection, err := server.Accept()
		if err != nil {
			return
		}
		heard, _ := io.ReadAll(connection)
		_, _ = connection.Write(append(heard, '!'))
		_ = connection.Close()
	}()
	client, err := net.Dial("tcp4", outside.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	_, _ = client.Write([]byte("hello"))
	_ = client.(*net.TCPConn).CloseWrite()
	if got, err := io.ReadAll(client); err != nil || string(got) != "hello!" {
		t.Errorf("got %q, %v", got, err)
	}

	_ = server.Close() // as while the API server is stopped
	client, err = net.Dial("tcp4", outside.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(client); len(got) > 0 || err == nil {
		t.Errorf("got %q, %v; want a broken connection", got, err)
	}
}

func TestCleanUpEndsOnlyItsOwn(t *testing.T) {
	dir := t.TempDir()
	if err := CleanUp(dir); err != nil {
		t.Errorf("where there never was a node: %v", err)
	}
	begin := func() (*exec.Cmd, marker) {
		t.Helper()
		sleep := exec.Command("sleep", "600")
		if err := sleep.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = sleep.Process.Kill() })
		m, err := newMarker(sleep.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		return sleep, m
	}
	cleanUp := func(m marker) {
		t.Helper()
		if err := m.write(dir); err != nil {
			t.Fatal(err)
		}
		if err := CleanUp(dir); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(filepath.Join(dir, markerFile)); !os.IsNotExist(err) {
			t.Errorf("the marker is left: %v", err)
		}
	}

	node, m := begin()
	cleanUp(m)
	if err := node.Wait(); err == nil || err.Error() != "signal: killed" {
		t.Errorf("the node's process: %v", err)
	}

	other, m := begin()
	later, rebooted := m, m
	later.Start += "1" // another process with the same id
	rebooted.Boot = "another run of the machine"
	cleanUp(later)
	cleanUp(rebooted)
	if !m.alive() {
		t.Error("a process of somebody else was ended")
	}
	_ = other.Process.Kill()
	_ = other.Wait()
	if _, err := newMarker(other.Process.Pid); err == nil {
		t.Error("a marker for a process that is gone")
	}
}
