package process

import (
	"fmt"
	"os"
	"strings"
	"syscall"
)

// dieWithParent has the kernel kill the child when we die, even by SIGKILL.
func dieWithParent(attr *syscall.SysProcAttr) {
	attr.Pdeathsig = syscall.SIGKILL
}

// Identity returns what tells this process from a later one with the same pid,
// its start time, and false when the process is gone or a zombie.
func Identity(pid int) (string, bool) {
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", false
	}
	// The second field, the name in parentheses, may itself hold anything.
	_, rest, found := cutLast(string(content), ")")
	fields := strings.Fields(rest)
	const state, startTime = 0, 19
	if !found || len(fields) <= startTime || fields[state] == "Z" || fields[state] == "X" {
		return "", false
	}
	return fields[startTime], true
}

func cutLast(s, separator string) (before, after string, found bool) {
	i := strings.LastIndex(s, separator)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(separator):], true
}
