package process

import (
	"context"
	"fmt"
	"os"
	"time"
)

const parentPollInterval = 500 * time.Millisecond

// WatchParent calls gone when the parent this process has now is replaced by
// another, which is how the kernel shows that it died.
func WatchParent(ctx context.Context, gone func(reason string)) {
	parent := os.Getppid()
	go poll(ctx, func() bool { return os.Getppid() == parent }, func() {
		gone(fmt.Sprintf("the parent process %d is gone", parent))
	})
}

// WatchPID calls gone when the process with this pid ends. It is an error when
// there is none to begin with.
func WatchPID(ctx context.Context, pid int, gone func(reason string)) error {
	first, alive := Identity(pid)
	if !alive {
		return fmt.Errorf("there is no process %d to watch", pid)
	}
	go poll(ctx, func() bool {
		now, alive := Identity(pid)
		return alive && now == first
	}, func() {
		gone(fmt.Sprintf("the watched process %d is gone", pid))
	})
	return nil
}

func poll(ctx context.Context, alive func() bool, gone func()) {
	ticker := time.NewTicker(parentPollInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			if !alive() {
				gone()
				return
			}
		}
	}
}
