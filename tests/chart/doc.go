// Package charttest tests the Helm chart: what it renders, what a real API server says to that, and that its alerts
// and dashboard speak of metrics that the operator really exports. `make chart` runs it.
package charttest
