package dependents

import (
	"testing"

	"github.com/tidwall/gjson"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
)

// Fields of the object as if they were labels: so Argo Workflows evaluates conditions.
type fields []byte

func (f fields) Has(path string) bool   { return gjson.GetBytes(f, path).Exists() }
func (f fields) Get(path string) string { return gjson.GetBytes(f, path).String() }
func (f fields) Lookup(path string) (string, bool) {
	return f.Get(path), f.Has(path)
}

// A step fails if any requirement of its failureCondition holds, and succeeds if all of its successCondition do.
func argoWorkflows(t *testing.T, object *unstructured.Unstructured) string {
	t.Helper()
	var workflow struct {
		Spec struct {
			Templates []struct {
				Resource *struct{ SuccessCondition, FailureCondition string }
			}
		}
	}
	example(t, "argo-workflows.yaml", &workflow)
	result := ""
	for _, template := range workflow.Spec.Templates {
		if template.Resource == nil {
			continue
		}
		content := fields(asJSON(t, object))
		result = "waits"
		success := requirements(t, template.Resource.SuccessCondition)
		if all(success, content) {
			result = "succeeds"
		}
		for _, requirement := range requirements(t, template.Resource.FailureCondition) {
			if requirement.Matches(content) {
				result = "fails"
			}
		}
	}
	if result == "" {
		t.Fatal("argo-workflows.yaml has no resource template")
	}
	return result
}

func all(requirements labels.Requirements, content fields) bool {
	for _, requirement := range requirements {
		if !requirement.Matches(content) {
			return false
		}
	}
	return true
}

func requirements(t *testing.T, condition string) labels.Requirements {
	t.Helper()
	selector, err := labels.Parse(condition)
	if err != nil {
		t.Fatal(err)
	}
	requirements, _ := selector.Requirements()
	if len(requirements) == 0 {
		t.Fatalf("the condition %q is empty", condition)
	}
	return requirements
}
