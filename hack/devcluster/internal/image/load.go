package image

import (
	"context"
	"fmt"
	"os/exec"
	"strings"
)

// criNamespace is where kubelet's containers and images are in containerd.
const criNamespace = "k8s.io"

// Load gives an image archive to containerd.
func Load(ctx context.Context, ctr, socket, archive string) error {
	command := exec.CommandContext(ctx, ctr, "--address", socket, "--namespace", criNamespace, "images", "import", archive)
	out, err := command.CombinedOutput()
	if err != nil {
		return fmt.Errorf("cannot load %s: %w: %s", archive, err, strings.TrimSpace(string(out)))
	}
	return nil
}
