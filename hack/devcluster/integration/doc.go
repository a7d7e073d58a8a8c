// Package integration runs a real cluster. Its tests need the built binary and
// some seconds, and run only with the build tag "integration".
package integration
