package ports

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func address(port int) string { return fmt.Sprintf("127.0.0.1:%d", port) }

func TestReservedPortIsHeldButCanBeShared(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("ports are held on Linux only")
	}
	reservation, err := Reserve(0)
	if err != nil {
		t.Fatal(err)
	}
	defer reservation.Release()

	if listener, err := net.Listen("tcp4", address(reservation.Port)); err == nil {
		_ = listener.Close()
		t.Error("another program could take the port")
	}
	if other, err := Reserve(reservation.Port); err != nil || other.Port == reservation.Port {
		t.Errorf("another cluster could reserve the port: %+v, %v", other, err)
	} else {
		other.Release()
	}
	if conn, err := net.Dial("tcp4", address(reservation.Port)); err == nil {
		_ = conn.Close()
		t.Error("a connection was accepted with nobody listening")
	}

	share := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		return raw.Control(func(fd uintptr) {
			_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
		})
	}}
	for range 2 { // as when a program is stopped and started
		listener, err := share.Listen(context.Background(), "tcp4", address(reservation.Port))
		if err != nil {
			t.Fatalf("the program itself cannot listen: %v", err)
		}
		conn, err := net.Dial("tcp4", address(reservation.Port))
		if err != nil {
			t.Errorf("no connection: %v", err)
		} else {
			_ = conn.Close()
		}
		_ = listener.Close()
	}
}

func TestPortWithOldConnectionsIsFree(t *testing.T) {
	listener, err := net.Listen("tcp4", address(0))
	if err != nil {
		t.Fatal(err)
	}
	port := listener.Addr().(*net.TCPAddr).Port
	client, err := net.Dial("tcp4", address(port))
	if err != nil {
		t.Fatal(err)
	}
	server, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	_ = server.Close() // the side that closes first stays in TIME_WAIT
	_ = client.Close()
	_ = listener.Close()

	reservation, err := Reserve(port)
	if err != nil || reservation.Port != port {
		t.Errorf("got %+v, %v; want port %d", reservation, err, port)
	}
	reservation.Release()
}

func TestRememberedPorts(t *testing.T) {
	file := filepath.Join(t.TempDir(), "ports.json")
	reserve := func(fresh bool) (int, int) {
		t.Helper()
		set, err := ReserveAll(file, fresh, "a", "b")
		if err != nil {
			t.Fatal(err)
		}
		defer set.Release()
		return set["a"].Port, set["b"].Port
	}
	a, b := reserve(false)
	if a == b {
		t.Fatalf("the same port twice: %d", a)
	}
	if a2, b2 := reserve(false); a2 != a || b2 != b {
		t.Errorf("ports changed from %d, %d to %d, %d", a, b, a2, b2)
	}

	taken, err := net.Listen("tcp4", address(a))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }()
	if a3, b3 := reserve(false); a3 == a || b3 != b {
		t.Errorf("port %d is taken: got %d, %d", a, a3, b3)
	}
}

func TestListenRemembersItsPort(t *testing.T) {
	file := filepath.Join(t.TempDir(), "ports.json")
	first, err := Listen(file, "a")
	if err != nil {
		t.Fatal(err)
	}
	port := first.Addr().(*net.TCPAddr).Port
	other, err := Listen(file, "a") // taken: another one
	if err != nil {
		t.Fatal(err)
	}
	if other.Addr().(*net.TCPAddr).Port == port {
		t.Errorf("port %d was given twice", port)
	}
	_ = first.Close()
	port = other.Addr().(*net.TCPAddr).Port
	_ = other.Close()
	// Inside the network namespace the cluster takes the same one.
	set, err := ReserveAll(file, false, "a", "b")
	if err != nil {
		t.Fatal(err)
	}
	defer set.Release()
	if set["a"].Port != port {
		t.Errorf("got port %d, want %d", set["a"].Port, port)
	}
}
