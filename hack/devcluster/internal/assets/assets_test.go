package assets

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestFind(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, mode os.FileMode) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), nil, mode); err != nil {
			t.Fatal(err)
		}
	}
	write("etcd", 0o755)
	write("kubectl", 0o644)
	if err := os.Symlink(filepath.Join(dir, "etcd"), filepath.Join(dir, "kube-apiserver")); err != nil {
		t.Fatal(err)
	}
	finder := Finder{Dir: dir, Self: "/self"}

	for _, name := range []string{"etcd", "kube-apiserver"} {
		got, err := finder.Find(name)
		want := filepath.Join(dir, name)
		if err != nil || got != (Program{Path: want, Arg0: want}) {
			t.Errorf("Find(%s) = %+v, %v; want the one in the directory", name, got, err)
		}
	}
	got, err := finder.Find("kube-controller-manager")
	if err != nil || got != (Program{Path: "/self", Arg0: "kube-controller-manager", BuiltIn: true}) {
		t.Errorf("a program the directory lacks: %+v, %v; want the built-in one", got, err)
	}
	if _, err := finder.Find("kubectl"); err == nil || !strings.Contains(err.Error(), "not an executable file") {
		t.Errorf("a file without execute permission: error %v", err)
	}
}

func TestFindWithoutDirectory(t *testing.T) {
	for _, dir := range []string{"", filepath.Join(t.TempDir(), "missing")} {
		got, err := Finder{Dir: dir, Self: "/self"}.Find("etcd")
		if err != nil || !got.BuiltIn {
			t.Errorf("dir %q: %+v, %v; want the built-in program", dir, got, err)
		}
	}
}
