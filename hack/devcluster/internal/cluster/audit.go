package cluster

import _ "embed" // for the policy

const (
	auditPolicyFile = "audit-policy.yaml"
	auditLogFile    = "audit.log"
)

//go:embed audit_policy.yaml
var auditPolicy []byte

func auditArgs(policy, log string) []string {
	return []string{
		"--audit-policy-file=" + policy,
		"--audit-log-path=" + log,
		"--audit-log-format=json",
		"--audit-log-mode=blocking",  // written before the request is done
		"--audit-log-maxsize=102400", // MB: never rotated
	}
}
