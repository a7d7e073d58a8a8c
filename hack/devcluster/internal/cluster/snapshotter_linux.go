package cluster

import "golang.org/x/sys/unix"

// snapshotter says how containerd keeps the files of containers. Overlays cannot
// be stacked: in a container, whose own files are one, they are copied.
func snapshotter(dir string) string {
	var stat unix.Statfs_t
	if unix.Statfs(dir, &stat) == nil && int64(stat.Type) == unix.OVERLAYFS_SUPER_MAGIC {
		return "native"
	}
	return "overlayfs"
}
