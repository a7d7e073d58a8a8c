package process

import (
	"os/exec"
	"runtime"
	"sync"
)

// Linux ties the "parent died" signal to the thread that started the child,
// not to the process. All children are therefore started by one thread that
// lives as long as the process; the runtime would end others as it pleases.
var (
	spawner  sync.Once
	requests = make(chan func())
)

func spawn(cmd *exec.Cmd) error {
	spawner.Do(func() {
		go func() {
			runtime.LockOSThread() // never unlocked
			for request := range requests {
				request()
			}
		}()
	})
	result := make(chan error)
	requests <- func() { result <- cmd.Start() }
	return <-result
}
