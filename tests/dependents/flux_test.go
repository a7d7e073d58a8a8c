package dependents

import (
	"testing"

	"github.com/google/cel-go/cel"
	"github.com/google/cel-go/common/types"
	"github.com/google/cel-go/ext"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// What Flux makes of healthCheckExprs (its RFC 0009): whatever status.observedGeneration shows to be stale is in
// progress; else the first of inProgress, failed and current that is true counts; else it is in progress. An
// expression that can't be evaluated fails, here as there: a field that is not always there must be asked for.
func flux(t *testing.T, object *unstructured.Unstructured) string {
	t.Helper()
	var kustomization struct {
		Spec struct {
			HealthCheckExprs []struct{ APIVersion, Kind, InProgress, Failed, Current string }
		}
	}
	example(t, "flux.yaml", &kustomization)
	if len(kustomization.Spec.HealthCheckExprs) != 1 {
		t.Fatal("flux.yaml has not one health check")
	}
	check := kustomization.Spec.HealthCheckExprs[0]
	if check.APIVersion != object.GetAPIVersion() || check.Kind != object.GetKind() || check.Current == "" {
		t.Fatalf("flux.yaml has no check of %s", object.GroupVersionKind())
	}

	observed, found, err := unstructured.NestedInt64(object.Object, "status", "observedGeneration")
	if err != nil {
		t.Fatal(err)
	}
	stale := found && observed != object.GetGeneration()
	result := "InProgress"
	for _, rule := range []struct{ expression, status string }{
		{check.InProgress, "InProgress"}, {check.Failed, "Failed"}, {check.Current, "Current"},
	} {
		// All are evaluated, so that an expression that fails on any object is seen.
		if rule.expression != "" && evaluate(t, rule.expression, object) && result == "InProgress" && !stale {
			result = rule.status
		}
	}
	return result
}

// Parsed but not type-checked, with the options and libraries that Flux gives to an expression.
func evaluate(t *testing.T, expression string, object *unstructured.Unstructured) bool {
	t.Helper()
	environment, err := cel.NewEnv(
		cel.HomogeneousAggregateLiterals(),
		cel.EagerlyValidateDeclarations(true),
		cel.DefaultUTCTimeZone(true),
		cel.CrossTypeNumericComparisons(true),
		cel.OptionalTypes(),
		ext.Strings(), ext.Sets(), ext.Encoders(),
	)
	if err != nil {
		t.Fatal(err)
	}
	parsed, issues := environment.Parse(expression)
	if issues.Err() != nil {
		t.Fatal(issues.Err())
	}
	program, err := environment.Program(parsed)
	if err != nil {
		t.Fatal(err)
	}
	value, _, err := program.Eval(object.Object)
	if err != nil {
		t.Fatalf("Flux: %s: %v", expression, err)
	}
	return value == types.True
}
