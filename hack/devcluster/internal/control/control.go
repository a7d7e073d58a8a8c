// Package control is the small protocol by which tests stop, start and pause
// components of a running cluster: one JSON object each way over a unix socket
// in the cluster's directory.
package control

// Command is what to do.
type Command string

// Commands. All but ListStatus need a component.
const (
	ListStatus Command = "status"
	Stop       Command = "stop"
	Start      Command = "start"
	Restart    Command = "restart"
	Pause      Command = "pause"
	Resume     Command = "resume"
)

// Commands lists all commands.
var Commands = []Command{ListStatus, Stop, Start, Restart, Pause, Resume}

// State is what a component is doing.
type State string

// States.
const (
	Stopped  State = "stopped"
	Starting State = "starting"
	Running  State = "running"
	Paused   State = "paused"
)

// Status is the state of one component.
type Status struct {
	Name  string `json:"name"`
	State State  `json:"state"`
	// PID is missing when there is no process.
	PID int `json:"pid,omitempty"`
}

// Request asks for a command to be carried out.
type Request struct {
	Command   Command `json:"command"`
	Component string  `json:"component,omitempty"`
}

// Response is sent when the command is done. Error is empty on success.
type Response struct {
	Error      string   `json:"error,omitempty"`
	Components []Status `json:"components"`
}
