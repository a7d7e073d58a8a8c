// Package assets decides which executable runs a component: one from the
// directory KUBEBUILDER_ASSETS names, as the Kubernetes test tools have it, or
// the program built into this binary.
package assets

import (
	"fmt"
	"os"
	"path/filepath"
)

// EnvVar names the directory whose programs take precedence.
const EnvVar = "KUBEBUILDER_ASSETS"

// Program is an executable and the name it has to be started under.
type Program struct {
	// Path is the file to execute.
	Path string
	// Arg0 becomes os.Args[0]; the built-in programs are selected by it.
	Arg0 string
	// BuiltIn is false for a program from the assets directory.
	BuiltIn bool
}

// Finder looks programs up.
type Finder struct {
	// Dir is the assets directory; empty when there is none.
	Dir string
	// Self is this binary.
	Self string
}

// FromEnv makes a Finder for this process.
func FromEnv() (Finder, error) {
	self, err := os.Executable()
	if err != nil {
		return Finder{}, fmt.Errorf("cannot find the devcluster binary itself: %w", err)
	}
	dir := os.Getenv(EnvVar)
	if dir != "" {
		if dir, err = filepath.Abs(dir); err != nil {
			return Finder{}, fmt.Errorf("%s: %w", EnvVar, err)
		}
	}
	return Finder{Dir: dir, Self: self}, nil
}

// Find returns the executable for name. A file that is there but cannot be
// executed is an error: silently using another version would mislead.
func (f Finder) Find(name string) (Program, error) {
	if f.Dir != "" {
		path := filepath.Join(f.Dir, name)
		info, err := os.Stat(path)
		switch {
		case err == nil && info.Mode().IsRegular() && info.Mode().Perm()&0o111 != 0:
			return Program{Path: path, Arg0: path}, nil
		case err == nil:
			return Program{}, fmt.Errorf("%s holds %s, but it is not an executable file", EnvVar, path)
		case !os.IsNotExist(err):
			return Program{}, fmt.Errorf("%s: %w", EnvVar, err)
		}
	}
	return Program{Path: f.Self, Arg0: name, BuiltIn: true}, nil
}
