package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// Programs are the programs of this machine that a node is made of.
type Programs struct {
	Containerd string
	Ctr        string
	// CNI is the directory of the network plugins.
	CNI string
}

// required lists programs and the Debian packages they come in.
var required = []struct{ program, packageName string }{
	{"containerd", "containerd"},
	{"containerd-shim-runc-v2", "containerd"},
	{"ctr", "containerd"},
	{"runc", "runc"},
	{"iptables-restore", "iptables"},
	{"ip6tables-restore", "iptables"},
}

const cniPackage = "containernetworking-plugins"

var (
	cniDirs    = []string{"/usr/lib/cni", "/opt/cni/bin", "/usr/libexec/cni"}
	cniPlugins = []string{"loopback", "ptp", "host-local", "portmap"}
)

// SystemPath is where these programs are looked for: a developer's PATH often
// lacks the administrator's directories.
func SystemPath() string {
	path := os.Getenv("PATH")
	for _, dir := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin"} {
		if !slices.Contains(filepath.SplitList(path), dir) {
			path += string(os.PathListSeparator) + dir
		}
	}
	return path
}

// Find looks for what a node needs; the error says all that is missing.
func Find() (Programs, error) {
	if err := supported(); err != nil {
		return Programs{}, err
	}
	found, problem := map[string]string{}, []string{}
	if os.Geteuid() != 0 {
		problem = append(problem, "it makes namespaces and cgroups: run it as root")
	}
	if err := os.Setenv("PATH", SystemPath()); err != nil {
		return Programs{}, err
	}
	var packages, programs []string
	for _, need := range required {
		path, err := exec.LookPath(need.program)
		if err == nil {
			found[need.program] = path
			continue
		}
		programs = append(programs, need.program)
		packages = append(packages, need.packageName)
	}
	cni := findCNI(cniDirs)
	if cni == "" {
		programs = append(programs, "the CNI plugins "+strings.Join(cniPlugins, ", "))
		packages = append(packages, cniPackage)
	}
	if len(packages) > 0 {
		problem = append(problem, fmt.Sprintf("missing: %s. On Debian or Ubuntu:\n  apt-get install --no-install-recommends %s",
			strings.Join(programs, ", "), strings.Join(slices.Compact(packages), " ")))
	}
	if len(problem) > 0 {
		return Programs{}, errors.New("a node cannot run here: " + strings.Join(problem, "; "))
	}
	return Programs{Containerd: found["containerd"], Ctr: found["ctr"], CNI: cni}, nil
}

func findCNI(dirs []string) string {
	for _, dir := range dirs {
		if !slices.ContainsFunc(cniPlugins, func(plugin string) bool {
			_, err := exec.LookPath(filepath.Join(dir, plugin))
			return err != nil
		}) {
			return dir
		}
	}
	return ""
}

// hidden are the directories that are the cluster's own inside: what lies below
// them outside is not seen there.
var hidden = []string{"/run", "/var/run", "/var/lib", "/var/log"}

// CheckPaths fails when one of the paths, which are needed inside, is hidden
// there. They need not exist yet.
func CheckPaths(paths map[string]string) error {
	for what, path := range paths {
		resolved, err := resolve(path)
		if err != nil {
			return err
		}
		for _, dir := range hidden {
			if resolved == dir || strings.HasPrefix(resolved, dir+"/") {
				return fmt.Errorf("%s, %s, is under %s, which is hidden from a node: put it elsewhere", what, path, dir)
			}
		}
	}
	return nil
}

// resolve follows links as far as the path exists.
func resolve(path string) (string, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	resolved, err := filepath.EvalSymlinks(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return resolved, err
	}
	parent, err := resolve(filepath.Dir(path))
	return filepath.Join(parent, filepath.Base(path)), err
}
