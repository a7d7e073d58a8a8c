package dependents

import (
	"context"
	"testing"
	"time"

	lua "github.com/yuin/gopher-lua"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// Runs the script of the example as Argo CD runs one of its ConfigMap: the object is the global `obj`, only base,
// package and table libraries are there, and it has a second. Returns the status; a script without a message fails.
func argoCD(t *testing.T, object *unstructured.Unstructured) string {
	t.Helper()
	var configMap struct {
		Data map[string]string `json:"data"`
	}
	example(t, "argo-cd.yaml", &configMap)
	script := configMap.Data["resource.customizations.health.geminibatch.dev_GeminiBatchJob"]
	if script == "" {
		t.Fatal("argo-cd.yaml has no script")
	}

	state := lua.NewState(lua.Options{SkipOpenLibs: true})
	defer state.Close()
	for name, open := range map[string]lua.LGFunction{
		lua.LoadLibName: lua.OpenPackage, lua.BaseLibName: lua.OpenBase, lua.TabLibName: lua.OpenTable,
	} {
		library := lua.P{Fn: state.NewFunction(open), Protect: true}
		if err := state.CallByParam(library, lua.LString(name)); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	state.SetContext(ctx)
	state.SetGlobal("obj", luaValue(t, state, object.Object))
	if err := state.DoString(script); err != nil {
		t.Fatal(err)
	}
	health, ok := state.Get(-1).(*lua.LTable)
	if !ok {
		t.Fatalf("the script returned a %s", state.Get(-1).Type())
	}
	if message := health.RawGetString("message"); message.Type() != lua.LTString || message.String() == "" {
		t.Errorf("Argo CD: the message is %q", message)
	}
	return health.RawGetString("status").String()
}

func luaValue(t *testing.T, state *lua.LState, value any) lua.LValue {
	t.Helper()
	switch value := value.(type) {
	case nil:
		return lua.LNil
	case bool:
		return lua.LBool(value)
	case string:
		return lua.LString(value)
	case int64:
		return lua.LNumber(value)
	case float64:
		return lua.LNumber(value)
	case []any:
		list := state.NewTable()
		for _, item := range value {
			list.Append(luaValue(t, state, item))
		}
		return list
	case map[string]any:
		fields := state.NewTable()
		for name, item := range value {
			fields.RawSetString(name, luaValue(t, state, item))
		}
		return fields
	default:
		t.Fatalf("%T is not of JSON", value)
		return nil
	}
}
